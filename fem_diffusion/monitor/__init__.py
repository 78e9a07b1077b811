"""A live page for operators: readings in, state and alarms out; `export_monitor` alone needs Firedrake."""
