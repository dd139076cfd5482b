"""The parts of a decoder layer. Only `linear` knows that adapters exist."""
