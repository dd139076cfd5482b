"""HTTP only: the OpenAI API, health and shutdown over any EngineClient."""
