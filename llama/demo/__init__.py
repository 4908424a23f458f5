"""A real tiny model in the box: the text it learns, how it is trained, and how it is judged.

The files of the model lie in this folder, as a release of Meta's would: `Llama.build` takes the
folder as its checkpoint. `python -m llama.demo.train` makes them from nothing and
`python -m llama.demo.evaluate` examines them. The surprising thing: nothing in it comes from
elsewhere; every sentence it has read is drawn from the grammars beside this file.
"""

# of consolidated.00.pth, as shipped
SHA256 = "3f61816dbec0e1bc592428539b622414bf7080023470124681b3f410d77dfdfb"
