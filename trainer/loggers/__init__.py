"""Where a training shows itself: the console and dashboards."""
