import sys

from tools.art.make import main

sys.exit(main())
