"""Many runs become tables, pictures and one page: python -m bqnn.report outputs/"""
