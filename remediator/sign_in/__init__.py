"""Signing in with a browser: by password, with OpenID Connect, or with Feishu."""
