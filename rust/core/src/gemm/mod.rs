//! Grouped GEMMs over the experts on the CPU.
