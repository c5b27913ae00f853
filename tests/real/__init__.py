"""Real models, fetched once into the cache."""
