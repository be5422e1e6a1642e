"""Devices, streams, and recorded programs of launches."""
