"""Answer each row of a DataFrame; run it again after a Ctrl-C or a crash, and it goes on."""

import pandas

from paceline import run_batch_sync

reviews = pandas.DataFrame({"text": ["It broke on day one.", "Best kettle ever.", "Fine."]}, index=["r1", "r2", "r3"])
results = run_batch_sync(reviews, prompt="One word for: {text}", model="gpt-4o-mini", journal="reviews.db")
for name, row in reviews.join(results.to_frame()).iterrows():
    print(name, row.text, "->", row.answer or row.error)
