"""Generation: one owner thread that runs every batch, whatever view it is on."""
