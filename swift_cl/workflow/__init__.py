"""From a plan (pure data) to a finished run: stages, manifest, resume."""
