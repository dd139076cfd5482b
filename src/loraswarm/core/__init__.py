"""Plain data that every layer speaks: requests, sequences, events, the engine's client protocol."""
