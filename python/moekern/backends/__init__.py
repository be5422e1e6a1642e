"""The three implementations of the verbs: reference (pure torch), cpu (Rust) and cuda (CuPy)."""
