"""Files that somebody made to do harm, generated when the tests run: nothing hostile is kept in the repository."""
