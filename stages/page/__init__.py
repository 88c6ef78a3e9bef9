"""The page about one run: outputs/RUN/report.html."""
