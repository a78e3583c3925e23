"""The record: tables, migrations, transactions and queries."""
