"""The public functions: they check their arguments, apply autocast, and call the verbs."""
