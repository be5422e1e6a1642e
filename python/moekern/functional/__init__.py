"""The public functions: they check their arguments, apply autocast, and hand over to the verbs."""
