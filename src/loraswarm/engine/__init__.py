"""When and in which order: the engine's loop, its scheduler, and the ways to reach it."""
