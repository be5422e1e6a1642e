"""The torch modules: the layer, its parameters, its short ways, and what walks a model."""
