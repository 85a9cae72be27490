"""Programs that measure Penstock against named peers on the machine they run on."""
