"""The credit report: a run's folder as the data of a page, and the page."""
