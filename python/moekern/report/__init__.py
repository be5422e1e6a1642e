"""What the reports of `moekern demo` and `moekern bench` share: pages, charts, the machine's description."""
