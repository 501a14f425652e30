"""The HTTP API over ``app.service``: parse, call, return."""
