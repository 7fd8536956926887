"""Text generation inside methods: the engine, the protocol "exactly N", checks of candidates, files and resume."""
