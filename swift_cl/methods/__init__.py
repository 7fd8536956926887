"""Continual-learning methods: `base.py` is the contract, `registry.py` the list, every other file one method."""
