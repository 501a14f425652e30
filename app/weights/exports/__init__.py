"""States of the model as folders that other programs read, and the way back."""
