"""The engine's own scheduler and policies on a fake clock: what would be, in seconds of a cost
model instead of a machine's. No torch."""
