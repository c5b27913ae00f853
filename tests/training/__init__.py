"""Training adapters on packed layers."""
