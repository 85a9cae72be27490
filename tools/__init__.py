"""What makes parts of this repository; none of it is in the distribution."""
