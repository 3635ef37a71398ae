"""What every part of the package shares: errors in one sentence, validated input, files and folders."""
