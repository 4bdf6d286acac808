// Included by each_set.h: the loop over memory for magnitudes.

// The largest of all numbers without their signs, as bits: in that order, NaN is above infinity.
template <class Bits>
LOOP static Bits largest(const uint8_t* memory, int64_t size) {
  Bits most = 0;
  for (int64_t i = 0; i < size; ++i) {
    const Bits magnitude = load<Bits>(memory + i * sizeof(Bits)) & (static_cast<Bits>(-1) >> 1);
    most = magnitude > most ? magnitude : most;
  }
  return most;
}
