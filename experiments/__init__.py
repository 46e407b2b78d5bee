"""One file per experiment; each states only what differs from the defaults in `vdit.config`."""
