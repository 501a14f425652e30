"""Measurements anyone can repeat: speed against the published procedure, edits in sequence."""
