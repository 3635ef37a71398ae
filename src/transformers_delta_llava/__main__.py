"""`python -m transformers_delta_llava` is `delta-llava`."""

from .cli.main import main


main()
