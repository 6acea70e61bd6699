"""Making it happen: a plan executed without data, journalled, resumable, in bounded memory."""
