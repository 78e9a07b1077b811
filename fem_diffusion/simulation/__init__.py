"""Joint samples of parameter and observation, written block by block to a resumable data set."""
