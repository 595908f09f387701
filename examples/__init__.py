"""Scripts that use the six modules, each read in a minute, and bridges to other projects.

python -m examples.search --images photos "a red car"     ranks the pictures of a folder
python -m examples.match photo.jpg "a car" "a bike"       which caption fits best
python -m examples.chat photo.jpg                         a conversation about one picture
python -m examples.embed photos.npy photos                embeddings in a file
python -m examples.fill captions.jsonl --images DIR       long captions for training data
python -m examples.describe photos captions.jsonl         captions for a bare folder of pictures
python -m examples.hold_out captions.jsonl                a tenth of them, kept back for a test
python -m examples.convert SOURCE train.jsonl             other people's training files
python -m examples.stats train.jsonl                      what training makes of a file
python -m examples.check                                  is everything here that training needs?
python -m examples.export RUN OUT                         a run for transformers
python -m examples.mteb_model, examples.clip_benchmark_model    a run in other people's tests
"""
