"""SGLang servers as a rollout engine; the only place that knows their protocol."""
