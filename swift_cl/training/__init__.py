"""Our SwiftSft and trainer: the only place that touches trainer hooks."""
