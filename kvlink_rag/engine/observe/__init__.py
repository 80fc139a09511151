"""Finished reports for those who watch: Prometheus metrics, OpenTelemetry spans."""
