"""A rate-limiting proxy before OpenAI-compatible model APIs."""
