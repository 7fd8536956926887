"""Serving: one server with a base model and the adapters of all stages, each under a name that carries its hash."""
