"""Questions to answers to scores to metrics: client, answer store, scorers, metrics, and the stage x task grid."""
