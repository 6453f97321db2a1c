"""Tables, figures and one page about many runs: python -m bqnn.report outputs/"""
