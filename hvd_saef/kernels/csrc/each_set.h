// Includes the file that HVD_SAEF_LOOPS names once for each instruction set, in the namespaces
// baseline, avx2 and avx512. There every function is declared with LOOP (or INNER, for those that have
// to become part of their caller), and HVD_SAEF_SET says which one it is compiled for: 0, 2 or 512.
// HVD_SAEF_DISPATCH(name, arguments) calls the loop of the set that was chosen at run time.
//
// Written after the file's other includes, inside namespace hvd_saef.

#define INNER LOOP inline __attribute__((always_inline))

namespace baseline {
#define LOOP
#define HVD_SAEF_SET 0
#include HVD_SAEF_LOOPS
#undef LOOP
#undef HVD_SAEF_SET
}  // namespace baseline

#if defined(__x86_64__)
namespace avx2 {
#define LOOP __attribute__((target("avx2")))
#define HVD_SAEF_SET 2
#include HVD_SAEF_LOOPS
#undef LOOP
#undef HVD_SAEF_SET
}  // namespace avx2

namespace avx512 {
#define LOOP __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#define HVD_SAEF_SET 512
#include HVD_SAEF_LOOPS
#undef LOOP
#undef HVD_SAEF_SET
}  // namespace avx512

#define HVD_SAEF_DISPATCH(name, ...)                          \
  (::hvd_saef::instruction_set() == Set::avx512 ? avx512::name(__VA_ARGS__) \
   : ::hvd_saef::instruction_set() == Set::avx2 ? avx2::name(__VA_ARGS__)   \
                                                : baseline::name(__VA_ARGS__))
#else
#define HVD_SAEF_DISPATCH(name, ...) baseline::name(__VA_ARGS__)
#endif

#undef INNER
