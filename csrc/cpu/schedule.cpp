// How a pass is run: what is decided about it, its memory, its chunks of steps, and how all of it is shared among
// threads. A row's results do not depend on the sharing, to the bit: each thread runs whole tiles, and a tile's
// arithmetic does not depend on the rows beside it (tile.h).
#include "schedule.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <memory>
#include <stdexcept>
#include <type_traits>
#include <utility>
#include <vector>

#include "../widths.h"
#include "dispatch.h"
#include "memory.h"

namespace pyrnnfast {
namespace {

// What finishing one unit of one row costs, beside its product, in operations of the product.
constexpr double kTailOperations = 100;

// What set_threshold may change; a negative value: the one written here.
struct Threshold {
  const char* name;
  std::atomic<int64_t> set{-1};

  int64_t or_else(int64_t built_in) const {
    const int64_t value = set.load(std::memory_order_relaxed);
    return value < 0 ? built_in : value;
  }
};
Threshold chunk_rows{"chunk_rows"};
// Below this many operations a call takes about as long as waking a team does (some 2 µs, more after a pause).
Threshold serial_operations{"serial_operations"};
constexpr int64_t kSerialOperations = 4'000'000;
// With so few rows in all, packing the weights costs more than it saves. Set: rows, whatever the call.
Threshold unpacked_rows{"unpacked_rows"};
// Forward it depends on the instruction set and on I + H (kernel.h), up to where it has been measured. Of several steps
// each reads unpacked weights anew, and more slowly than packed ones: it counts as so many rows more, which are many
// where the weights come from memory and not from a cache.
constexpr int64_t kMostUnpackedRows = 96, kRowsPerStep = 3;
constexpr int64_t kFarWeights = int64_t{16} << 20, kRowsPerFarStep = 25;
// Backward, of several steps and of a single one, where a panel would be used once.
constexpr int64_t kUnpackedSteps = 8, kUnpackedBackwardStep = 16;
// With fewer rows than this a thread, tiles are too low to be efficient. Set: rows are shared before units.
Threshold rows_per_thread{"rows_per_thread"};
constexpr int64_t kRowsPerThread = 4;
// So large a W_hh does not fit the second cache: threads that each have few rows had better share its units.
constexpr int64_t kLargeWeights = 192 << 10, kFewRows = 16;

// A result beyond this may come fresh from the system at each call: always beyond 32 MB (glibc's largest threshold),
// and else where the heap has been cut back meanwhile.
constexpr size_t kPerhapsFresh = size_t{3} << 20;

// The memory of one call. What a call has used is kept for the next one, at most kKept bytes of it: memory that is
// given back comes fresh from the system the next time, and its first touch takes longer than many a kernel.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : memory_(spare.exchange(nullptr)) {
    if (memory_ != nullptr && memory_->bytes >= bytes) return;
    memory_.reset();  // before there is more
    memory_ = allocate(bytes);
  }
  ~Scratch() {
    if (memory_->bytes <= kKept) memory_.reset(spare.exchange(memory_.release()));
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  std::byte* data() const { return memory_->data(); }

 private:
  // The packed weights of an LSTM of 1024 units and inputs, and its rows of a chunk.
  static constexpr size_t kKept = size_t{64} << 20;
  static std::atomic<Block*> spare;  // a call at the same time finds none, and takes its own

  Allocation memory_;
};
std::atomic<Block*> Scratch::spare{nullptr};

// The cost of the rows [begin, end) of a chunk's steps, in rows: fewer than a low tile's take no less time, as the
// weights have to be read all the same.
int64_t cost(const Problem& p, const Chunk& chunk, int64_t begin, int64_t end) {
  constexpr int64_t low_tile = 3;
  int64_t total = 0;
  for (int64_t t = chunk.first; t < chunk.last; ++t) {
    const int64_t rows = std::min(end, p.offsets[t + 1] - p.offsets[t]) - begin;
    if (rows > 0) total += std::max(rows, low_tile);
  }
  return total;
}

bool is_dense(const Problem& p) { return p.offsets[p.steps] == p.steps * p.batch; }

// The end of a group of rows that begins at `begin`, when all rows from there on are cut into `groups` of equal cost in
// a chunk.
int64_t group_end(const Problem& p, const Chunk& chunk, int64_t begin, int64_t groups) {
  int64_t low = begin, high = p.batch;
  if (is_dense(p)) return begin + (p.batch - begin) / groups;
  if (groups == 1) return p.batch;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (cost(p, chunk, begin, middle) < cost(p, chunk, middle, p.batch) / (groups - 1)) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// The chunk after `before` in the order of the pass: as many steps as have at most `rows` rows, and at least one.
Chunk next_chunk(const Problem& p, bool descending, const Chunk& before, int64_t rows) {
  const int index = before.index + 1;
  if (descending) {
    const int64_t last = before.index < 0 ? p.steps : before.first;
    int64_t first = last - 1;
    while (first > 0 && p.offsets[last] - p.offsets[first - 1] <= rows) --first;
    return {first, last, index};
  }
  const int64_t first = before.index < 0 ? 0 : before.last;
  int64_t last = first + 1;
  while (last < p.steps && p.offsets[last + 1] - p.offsets[first] <= rows) ++last;
  return {first, last, index};
}

bool is_last(const Problem& p, bool descending, const Chunk& chunk) {
  return descending ? chunk.first == 0 : chunk.last == p.steps;
}

// A result that may be large: all rows but the last, behind which others' memory may lie.
struct Result {
  void* data;
  size_t bytes;
  Result(const Matrix& m, int64_t rows, int64_t element)
      : data(m.data), bytes(static_cast<size_t>((rows - 1) * m.stride * element)) {}
};

// What differs between the passes.
template <class P>
struct Order;
template <>
struct Order<Forward> {
  static constexpr bool products_first = true;
  static bool descending(const Forward& p) { return p.reverse; }
  static std::array<Result, 3> results(const Forward& p) {
    const int64_t rows = p.offsets[p.steps], element = bytes_of(p.dtype);
    return {Result(p.y, rows, element), Result(p.saved, rows, element),
            Result(p.cells, rows, std::max(element, bytes_of(Dtype::float32)))};
  }
};
template <>
struct Order<Backward> {
  static constexpr bool products_first = false;
  static bool descending(const Backward& p) { return !p.reverse; }
  static std::array<Result, 4> results(const Backward& p) {
    const int64_t gate_rows = widths_of(p.cell).gates * p.hidden, element = bytes_of(p.dtype);
    return {Result(p.dx, p.offsets[p.steps], element), Result(p.dweight_ih, gate_rows, element),
            Result(p.dweight_hh, gate_rows, element), Result(p.dweight_hr, p.outputs, element)};
  }
};

// Whether so many blocks are about even shares for the threads, whatever is left over.
bool deal_evenly(int64_t blocks, int threads) { return blocks % threads == 0 || blocks >= 4 * threads; }

// What a step of the recurrence multiplies with.
int64_t weights_of_step(const Problem& p) {
  return (widths_of(p.cell).gates + (p.weight_hr.data != nullptr ? 1 : 0)) * p.hidden * p.outputs;
}

// Into how many groups the rows are cut, each for one thread or for several that share its units. Groups do not
// wait for one another within a chunk; but those of ragged rows end at different times, whatever the cut, as rows go by
// whole tiles.
// `rows_set`: the threshold, read once for the whole team.
int groups_of(const Problem& p, int64_t blocks, int64_t rows_set, int threads) {
  const bool large = weights_of_step(p) >= kLargeWeights;
  // Of a single step no thread waits for another between steps, and each reads its part of the weights only.
  const bool apart = p.steps == 1 && deal_evenly(blocks, threads);
  const bool share_units = !is_dense(p) || (large && p.batch < kFewRows * threads) || apart;
  const int64_t most = p.batch / (rows_set < 0 ? kRowsPerThread : std::max<int64_t>(rows_set, 1));
  const int64_t wanted = share_units && rows_set < 0 ? (threads + blocks - 1) / blocks : threads;
  return static_cast<int>(std::clamp<int64_t>(std::min(wanted, most), 1, threads));
}

// A chunk has at least one step.
int64_t chunk_rows_of(const Problem& p, int64_t wanted) {
  return std::min(p.offsets[p.steps], std::max(wanted, p.batch));
}

// `groups`: of rows (groups_of). Bits depend on whether weights are packed, so that must not depend on the threads;
// when they are may.
Plan make_plan(const Forward& p, const InstructionSet& isa, const Kernel<Forward>& kernel, int groups, int threads) {
  const int64_t rows = p.offsets[p.steps];
  // A first step without a state has no recurrent product: half as much to add up for each row.
  const int64_t depth = p.steps > 1 || p.h0.data != nullptr ? p.inputs + p.outputs : 2 * p.inputs;
  const bool from_far = widths_of(p.cell).gates * p.hidden * depth * bytes_of(p.dtype) > kFarWeights;
  const int64_t read_again = (p.steps - 1) * (from_far ? kRowsPerFarStep : kRowsPerStep);
  const int64_t most = p.steps == 1 ? isa.most_unpacked_rows[static_cast<int>(p.dtype)] : kMostUnpackedRows;
  const int64_t few = std::min(depth / isa.depth_per_row[static_cast<int>(p.dtype)], most) - read_again;
  Plan plan{};
  plan.threads = threads;
  plan.output_vectors = kernel.output_vectors(p, threads / groups);
  if (rows > unpacked_rows.or_else(few)) plan.hidden = p.steps == 1 && groups == 1 ? Packing::at_use : Packing::before;
  // Few, so that the chunk stays in the second cache; more where W_ih itself has to come from far away for each chunk.
  const bool far = widths_of(p.cell).gates * p.hidden * p.inputs >= (int64_t{2} << 20);
  plan.chunk_rows = chunk_rows_of(p, chunk_rows.or_else(far ? 512 : 128));
  // In a single chunk each panel of W_ih is used once.
  const bool once = plan.chunk_rows == rows && groups == 1 && kernel.blocks(p.hidden) % threads == 0;
  plan.input = plan.hidden == Packing::before && once ? Packing::at_use : plan.hidden;
  return plan;
}

Plan make_plan(const Backward& p, const InstructionSet&, const Kernel<Backward>& kernel, int groups, int threads) {
  const int64_t rows = p.offsets[p.steps];
  Plan plan{};
  plan.threads = threads;
  plan.output_vectors = kernel.output_vectors(p, threads / groups);
  // Each chunk reads and writes dW once, and its dgates: this many rows balance the two.
  const int64_t wanted = chunk_rows.or_else(std::clamp<int64_t>(p.inputs + p.outputs, 256, 512));
  plan.chunk_rows = chunk_rows_of(p, wanted);
  // Threads that cannot share panels evenly share rows, and would all pack all panels.
  const auto packing = [&](bool used_once, int64_t columns) {
    return used_once && deal_evenly(kernel.blocks(columns), threads) ? Packing::at_use : Packing::before;
  };
  const int64_t few = p.steps == 1 ? kUnpackedBackwardStep : kUnpackedSteps;
  const bool narrow = bytes_of(p.dtype) == 2;
  if (!narrow && rows <= unpacked_rows.or_else(few)) return plan;
  plan.hidden = packing(p.steps == 1, p.outputs);
  // Read once a chunk, for dx: from the second chunk on packing pays.
  if (narrow || rows > wanted) plan.input = packing(rows <= plan.chunk_rows, p.inputs);
  return plan;
}

template <class P>
struct Job {
  const P& problem;
  const Kernel<P>& kernel;
  Plan plan;
  int64_t blocks, rows_set;
  std::vector<Barrier> barriers;  // of each group of rows
  Barrier everyone;

  static void body(void* context, int rank, int size) { static_cast<Job*>(context)->run(rank, size); }

  void run(int rank, int size) {
    const int groups = groups_of(problem, blocks, rows_set, size);
    Chunk before{0, 0, -1};
    Share share = share_for(rank, size, groups, before);
    const bool descending = Order<P>::descending(problem);
    const bool ragged_groups = groups > 1 && !is_dense(problem);
    kernel.begin(problem, plan, share);
    wait(size);
    for (bool last = false; !last;) {
      const Chunk chunk = next_chunk(problem, descending, before, plan.chunk_rows);
      if (ragged_groups) {
        // Groups share the room of a chunk's rows, a row's place in it changes from chunk to chunk, and so may the
        // thread that goes on with its states.
        if (Order<P>::products_first && chunk.index > 0) wait(size);
        // Between two chunks all wait for one another; cut once for all steps, some would have little to do in the
        // first of them and others in the last.
        share = share_for(rank, size, groups, chunk);
      }
      const bool sweeps = share.row_begin < share.row_end;
      if (Order<P>::products_first && sweeps) kernel.products(problem, plan, chunk, share);
      if (sweeps) kernel.sweep(problem, plan, chunk, before, share);
      if (!Order<P>::products_first) {
        // What a chunk's products read is not written again before all have come to the next chunk's; and what a row
        // carries back may be another thread's to take up.
        wait(size);
        kernel.products(problem, plan, chunk, share);
      }
      before = chunk;
      last = is_last(problem, descending, chunk);
    }
    kernel.end(problem, plan, before, share);
  }

 private:
  // The team may be smaller than was asked for, and is known only inside it.
  Share share_for(int rank, int size, int groups, const Chunk& chunk) {
    const int members = static_cast<int>(std::min<int64_t>(size / groups, blocks));
    const int group = rank / members, member = rank % members;
    if (group >= groups) return Share{rank, size, 0, 0, 0, 0, 0, 1, nullptr};
    int64_t begin = 0, end = group_end(problem, chunk, 0, groups);
    for (int g = 1; g <= group; ++g) {
      begin = end;
      end = group_end(problem, chunk, begin, groups - g);
    }
    return {rank,
            size,
            begin,
            end,
            blocks * member / members,
            blocks * (member + 1) / members,
            member,
            members,
            members > 1 ? &barriers[static_cast<size_t>(group)] : nullptr};
  }

  void wait(int size) {
    if (size > 1) everyone.wait(size);
  }
};

// Panels that outlive a call of so planned a pass; null: there are none, and it packs its weights as is best for
// itself.
std::shared_ptr<Panels> panels_for(const Forward& p, const InstructionSet& isa, const Kernel<Forward>& kernel,
                                   Plan plan, KeptPanels& kept) {
  int64_t bytes[kRegions] = {};
  plan.hidden = plan.input = Packing::before;
  kernel.layout(p, plan, bytes);
  // A single step without a state has no use for W_hh, and would leave it out for those that have.
  return bytes[kPackedHidden] == 0 ? nullptr : kept.find(key_of(p, isa, plan, bytes));
}

template <class P>
void run_kernel(const P& p, const InstructionSet& isa, const Kernel<P>& kernel, int wanted,
                KeptPanels* kept = nullptr) {
  const int64_t rows = p.offsets[p.steps];
  // A step counts as a row more: even of one row it has to read all the weights.
  const auto weights = static_cast<double>(widths_of(p.cell).gates * p.hidden * p.inputs + weights_of_step(p));
  const double operations =
      static_cast<double>(rows + p.steps) * (2.0 * weights + kTailOperations * static_cast<double>(p.hidden));
  const bool serial = operations < static_cast<double>(serial_operations.or_else(kSerialOperations));
  Team team(serial ? 1 : wanted);
  const int64_t blocks = kernel.blocks(p.hidden), rows_set = rows_per_thread.or_else(-1);
  const int groups = groups_of(p, blocks, rows_set, team.size());
  // Forward, all work is divided as the recurrence is.
  if (Order<P>::products_first) team.shrink(groups * blocks);
  for (const Result& result : Order<P>::results(p)) {
    if (result.bytes > kPerhapsFresh) wish_for_large_pages(result.data, result.bytes);
  }
  Plan plan = make_plan(p, isa, kernel, groups, team.size());
  std::shared_ptr<Panels> panels;
  if constexpr (std::is_same_v<P, Forward>) {
    if (kept != nullptr) panels = panels_for(p, isa, kernel, plan, *kept);
    if (panels != nullptr) plan.hidden = plan.input = panels->filled ? Packing::kept : Packing::before;
  }
  int64_t bytes[kRegions] = {};
  kernel.layout(p, plan, bytes);
  if (panels != nullptr) {
    for (const Region r : kPanelRegions) bytes[r] = 0;
  }
  // A cache line between the regions: two of the same power of two in size would fall upon one another in the caches.
  constexpr size_t line = 64;
  size_t begin[kRegions], total = 0;
  for (int r = 0; r < kRegions; ++r) {
    begin[r] = total;
    if (bytes[r] > 0) total += (static_cast<size_t>(bytes[r]) + 2 * line - 1) / line * line;
  }
  const Scratch scratch(total);
  for (int r = 0; r < kRegions; ++r) plan.region[r] = bytes[r] > 0 ? scratch.data() + begin[r] : nullptr;
  if (panels != nullptr) {
    for (size_t i = 0; i < kPanelRegions.size(); ++i) plan.region[kPanelRegions[i]] = panels->region[i];
  }
  Job<P> job{p, kernel, plan, blocks, rows_set, std::vector<Barrier>(static_cast<size_t>(team.size())), {}};
  // Back, each product is two: with the weights, and of the rows.
  team.run(Job<P>::body, &job, Order<P>::products_first ? operations : 2 * operations);
  if (panels != nullptr && !panels->filled) {
    panels->filled = true;
    kept->keep(std::move(panels));
  }
}

}  // namespace

void run(const Forward& p, int threads, KeptPanels* kept) {
  const InstructionSet& isa = instruction_set_in_use();
  run_kernel(p, isa, isa.forward[static_cast<int>(p.cell)][static_cast<int>(p.dtype)], threads, kept);
}

void run(const Backward& p, int threads) {
  const InstructionSet& isa = instruction_set_in_use();
  run_kernel(p, isa, isa.backward[static_cast<int>(p.cell)][static_cast<int>(p.dtype)], threads);
}

void run(const Product& p, int threads) {
  const InstructionSet& isa = instruction_set_in_use();
  struct Call {
    const Product& problem;
    ProductFn fn;
    void* panel;
  };
  const Team team(threads);
  const Scratch panel(static_cast<size_t>(isa.product_panel_bytes * team.size()));
  Call call{p, isa.product[static_cast<int>(p.dtype)], panel.data()};
  const auto body = [](void* context, int rank, int size) {
    const auto& c = *static_cast<const Call*>(context);
    c.fn(c.problem, c.panel, rank, size);
  };
  team.run(body, &call, 2.0 * static_cast<double>(p.rows * p.columns * p.depth) * static_cast<double>(p.samples));
}

void set_threshold(const std::string& name, int64_t value) {
  for (Threshold* threshold : {&chunk_rows, &unpacked_rows, &serial_operations, &rows_per_thread}) {
    if (name == threshold->name) {
      threshold->set = value;
      return;
    }
  }
  if (name == "processors") return set_processors(value);
  throw std::invalid_argument("there is no threshold '" + name + "'");
}

}  // namespace pyrnnfast
