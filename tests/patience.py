"""How long a test waits for what must come: long enough that only what hangs is waited out."""

SECONDS = 60.0
