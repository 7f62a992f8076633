"""What a run leaves behind and shows: metrics, samples, timings, versions, progress."""
