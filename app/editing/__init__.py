"""Editing methods: from a state of the model and facts to a delta. Nothing here is applied."""
