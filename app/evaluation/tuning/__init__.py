"""Tuning: the layer and the strength a method should edit a model with, by trial."""
