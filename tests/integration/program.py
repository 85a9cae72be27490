"""Run the source that is the first argument, as a module can be run and forked."""

import sys

exec(sys.argv[1])
